"""hostos: a tiny Linux, and containers booted from a hash in a peer-to-peer network."""

__version__ = "0.1.0"
