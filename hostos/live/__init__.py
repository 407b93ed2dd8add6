"""Live boot: an image hash becomes a mounted tree. Runs in the guest and natively."""

from hostos.live.emulated import prefer_plain_code

# Here, as libcrypto must not have been loaded yet, whichever of the modules is run.
prefer_plain_code()
