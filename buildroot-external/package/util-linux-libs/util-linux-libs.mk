################################################################################
#
# util-linux-libs: in addition to Buildroot's own recipe
#
################################################################################

UTIL_LINUX_LIBS_POST_CONFIGURE_HOOKS += HOSTOS_NO_BUILD_RPATH
