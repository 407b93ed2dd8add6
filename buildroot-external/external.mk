# Libtool writes the build directory into programs and libraries as RPATH; it is
# overwritten when the target directory is finished, but its length stays behind,
# and two builds in different directories would differ.
define HOSTOS_NO_BUILD_RPATH
	$(SED) 's,^hardcode_libdir_flag_spec=.*,hardcode_libdir_flag_spec="",' \
		-e 's,^hardcode_into_libs=.*,hardcode_into_libs=no,' \
		-e 's,^runpath_var=.*,runpath_var=HOSTOS_NONE,' $(@D)/libtool
endef

include $(sort $(wildcard $(BR2_EXTERNAL_HOSTOS_PATH)/package/*/*.mk))
