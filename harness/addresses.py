"""Who is who on the networks of tests, lab and bench: one guest, a node (or two), and a client on its uplink."""

NODE_MAC, CLIENT_MAC, GUEST_MAC = "02:00:00:00:00:0a", "02:00:00:00:00:01", "aa:00:00:35:ac:01"
NODE_IP4, CLIENT_IP4, GUEST_IP4 = "192.0.2.11", "192.0.2.1", "192.0.2.8"
NODE_IP6, CLIENT_IP6, GUEST_IP6 = "2001:db8::11", "2001:db8::1", "2001:db8::8"
GUEST_EUI64, GUEST_LINK_LOCAL = "2001:db8::a800:ff:fe35:ac01", "fe80::a800:ff:fe35:ac01"  # of that MAC
TAP_MAC = "fe" + GUEST_MAC[2:]  # what a tap of that guest has to have
IPS = [GUEST_IP4, GUEST_IP6]
FOREIGN_MAC = "02:00:00:00:00:0b"  # of another node
