################################################################################
#
# dbus: in addition to Buildroot's own recipe
#
################################################################################

DBUS_POST_CONFIGURE_HOOKS += HOSTOS_NO_BUILD_RPATH
