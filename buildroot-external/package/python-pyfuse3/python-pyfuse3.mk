################################################################################
#
# python-pyfuse3
#
################################################################################

PYTHON_PYFUSE3_VERSION = 3.4.0
PYTHON_PYFUSE3_SOURCE = pyfuse3-$(PYTHON_PYFUSE3_VERSION).tar.gz
# from where Buildroot has its own Python packages
PYTHON_PYFUSE3_SITE = $(firstword $(subst /packages/,/packages/ ,$(PYTHON_SETUPTOOLS_SITE)))source/p/pyfuse3
PYTHON_PYFUSE3_SETUP_TYPE = setuptools
PYTHON_PYFUSE3_LICENSE = LGPL-2.1+
PYTHON_PYFUSE3_LICENSE_FILES = LICENSE
PYTHON_PYFUSE3_DEPENDENCIES = host-pkgconf libfuse3

$(eval $(python-package))
