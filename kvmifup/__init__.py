"""Wire the taps of KVM guests, in separate phases before and after a live migration."""

__version__ = "0.1.0"
