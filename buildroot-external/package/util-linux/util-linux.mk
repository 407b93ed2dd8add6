################################################################################
#
# util-linux: in addition to Buildroot's own recipe
#
################################################################################

UTIL_LINUX_POST_CONFIGURE_HOOKS += HOSTOS_NO_BUILD_RPATH
