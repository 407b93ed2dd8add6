################################################################################
#
# hostos-live
#
################################################################################

HOSTOS_LIVE_VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' $(BR2_EXTERNAL_HOSTOS_PATH)/../hostos/__init__.py)
HOSTOS_LIVE_SITE = $(BR2_EXTERNAL_HOSTOS_PATH)/../hostos
HOSTOS_LIVE_SITE_METHOD = local
HOSTOS_LIVE_LICENSE = Apache-2.0
HOSTOS_LIVE_LICENSE_FILES = LICENSE
HOSTOS_LIVE_DEPENDENCIES = python3

# The licence is that of the whole project, one directory above.
define HOSTOS_LIVE_COPY_LICENSE
	cp $(BR2_EXTERNAL_HOSTOS_PATH)/../LICENSE $(@D)/LICENSE
endef
HOSTOS_LIVE_POST_RSYNC_HOOKS += HOSTOS_LIVE_COPY_LICENSE

# Sources, readable in the image until python3's own target-finalize step turns
# what is below /usr/lib/python* into byte code; these few files are outside it.
define HOSTOS_LIVE_INSTALL_TARGET_CMDS
	$(INSTALL) -D -m 0644 -t $(TARGET_DIR)/usr/lib/hostos/python/hostos \
		$(@D)/__init__.py $(@D)/errors.py
	$(INSTALL) -D -m 0644 -t $(TARGET_DIR)/usr/lib/hostos/python/hostos/live \
		$(@D)/live/*.py
endef

$(eval $(generic-package))
