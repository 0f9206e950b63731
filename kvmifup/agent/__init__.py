"""kvm-ifupd: hooks run warm, arrivals, departures, and nothing left over."""
