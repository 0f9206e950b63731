"""Results for people, programs, the log and `kvm-ifup watch`."""
