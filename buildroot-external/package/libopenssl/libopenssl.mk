################################################################################
#
# libopenssl: in addition to Buildroot's own recipe
#
################################################################################

# It calls its directory lib64, which in the staging directory is a link to lib.
# pkg-config takes that for a place of its own, and Meson then writes the whole
# path of the staging directory into every program of systemd, as RPATH.
define LIBOPENSSL_NAME_ITS_DIRECTORY
	$(SED) 's,^libdir=.*,libdir=$${exec_prefix}/lib,' \
		$(STAGING_DIR)/usr/lib/pkgconfig/libcrypto.pc \
		$(STAGING_DIR)/usr/lib/pkgconfig/libssl.pc \
		$(STAGING_DIR)/usr/lib/pkgconfig/openssl.pc
endef
LIBOPENSSL_POST_INSTALL_STAGING_HOOKS += LIBOPENSSL_NAME_ITS_DIRECTORY
