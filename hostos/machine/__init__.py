"""An OS build becomes a running virtual machine (docs/machine.md)."""
