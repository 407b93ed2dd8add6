"""Live boot: an image hash becomes a mounted tree. Runs in the guest and natively."""
