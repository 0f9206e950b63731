"""kvm-ifupd, the node's agent: hooks run warm, arrivals, departures, uplinks that come back, and nothing left over.

Threads
-------

The loop (`loop.Loop.run`) has the main thread. It runs what events, timers and signals call, one thing at a time,
and does nothing that takes long. One piece of work is done there on purpose: a guest that arrives, and for whom all
is prepared, is wired at once (`arrivals.Arrivals`). `Loop.work` gives everything else to one of two pools of threads:
one for hooks, one for what the agent does by itself. The two are apart because all hooks may wait for one lock.

=====================  =============================================================================================
only in the loop       what the rooms keep: the records of taps, queues, timers, listeners. It needs no locks
in threads             functions whose docstring begins with "In a thread". They get what they need as arguments, and
                       what they return goes to a method in the loop. Of a record they read only what never changes
from any thread        `Loop.soon`, `Runner`, `Metrics`, `Announcements.begin` and `repeat`. `Runner.config` is
                       replaced as a whole, in the loop
shared by both         a `hook_server.Exchange`: its lock keeps the thread's answer and the loop's signs of life apart
=====================  =============================================================================================

Runs that change a tap keep out of each other's way by the locks of `kvmifup.runs.locks`, whether they run in the
loop, in a thread or in another process.
"""
