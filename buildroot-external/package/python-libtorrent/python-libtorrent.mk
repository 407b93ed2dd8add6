################################################################################
#
# python-libtorrent
#
################################################################################

PYTHON_LIBTORRENT_VERSION = 2.0.11
PYTHON_LIBTORRENT_SOURCE = libtorrent-rasterbar-$(PYTHON_LIBTORRENT_VERSION).tar.gz
PYTHON_LIBTORRENT_SITE = https://github.com/arvidn/libtorrent/releases/download/v$(PYTHON_LIBTORRENT_VERSION)
PYTHON_LIBTORRENT_LICENSE = BSD-3-Clause, BSL-1.0 (parts), MIT (parts)
PYTHON_LIBTORRENT_LICENSE_FILES = COPYING LICENSE
PYTHON_LIBTORRENT_CPE_ID_VENDOR = libtorrent
PYTHON_LIBTORRENT_CPE_ID_PRODUCT = libtorrent
PYTHON_LIBTORRENT_DEPENDENCIES = boost host-python3 openssl python3
PYTHON_LIBTORRENT_SUPPORTS_IN_SOURCE_BUILD = NO

# One extension module with only its init function visible: unused parts of the
# library are then left out by the linker.
PYTHON_LIBTORRENT_CONF_OPTS = \
	-DBUILD_SHARED_LIBS=OFF \
	-DCMAKE_POSITION_INDEPENDENT_CODE=ON \
	-DCMAKE_CXX_FLAGS="$(TARGET_CXXFLAGS) -fvisibility=hidden -fvisibility-inlines-hidden -ffunction-sections -fdata-sections" \
	-DCMAKE_MODULE_LINKER_FLAGS="$(TARGET_LDFLAGS) -Wl,--gc-sections -Wl,--as-needed" \
	-Dboost-python-module-name=python$(subst .,,$(PYTHON3_VERSION_MAJOR)) \
	-Dbuild_examples=OFF \
	-Dbuild_tests=OFF \
	-Dbuild_tools=OFF \
	-Dlogging=$(if $(BR2_PACKAGE_PYTHON_LIBTORRENT_LOGGING),ON,OFF) \
	-Dpython-bindings=ON \
	-Dpython-egg-info=OFF \
	-Dpython-install-system-dir=ON \
	-DPython3_EXECUTABLE=$(HOST_DIR)/bin/python3 \
	-DPython3_INCLUDE_DIR=$(STAGING_DIR)/usr/include/python$(PYTHON3_VERSION_MAJOR) \
	-DPython3_LIBRARY=$(STAGING_DIR)/usr/lib/libpython$(PYTHON3_VERSION_MAJOR).so

# CMake names the module after the build machine's Python and would install it
# there; "libtorrent.so" is right on every architecture.
define PYTHON_LIBTORRENT_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0755 \
		$(wildcard $(@D)/buildroot-build/bindings/python/libtorrent*.so) \
		$(TARGET_DIR)/usr/lib/python$(PYTHON3_VERSION_MAJOR)/site-packages/libtorrent.so
endef

$(eval $(cmake-package))
