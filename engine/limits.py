"""The engine's own limits, each with its reason. What two processes share is in ``protocol/limits.py``."""

from __future__ import annotations

from protocol.limits import HANDSHAKE_TIMEOUT_S, LINK_STALL_TIMEOUT_S

STRAGGLER_WAIT_S = 1.0
"""How long an open waits for members that do not answer. Longer would break "first I/O again within
2 s of a kill"; shorter would leave out replica servers that start together with the engine."""

LEASE_WAIT_S = 1.1
"""After its claims an engine serves nobody for this long, unless all older engines are known to have ended:
one that was paused may go on answering reads for READ_LEASE_S after a replica's last answer. The rest is for
clocks of machines that do not run at quite the same speed, and timers that fire early."""

CONNECT_TIMEOUT_S = 2.0
"""From the first packet to the end of a hello. A server that is up answers in milliseconds."""

CALL_TIMEOUT_S = 2.0
"""A call that a membership change or an open waits for: one or two fsyncs. A replica that needs longer is
treated as lost, like one that does not answer writes for LINK_STALL_TIMEOUT_S."""

LONG_CALL_TIMEOUT_S = 60.0
"""A call that may write much: marking, pulling, flushing and cleaning regions. Nobody's acknowledgement
waits for it."""

RECONNECT_BASE_S = 0.02
RECONNECT_CAP_S = 1.0
"""Delay before the next connection, with jitter. The cap keeps "a resync starts within 2 s of the return";
the base makes a restarted process on one machine cost almost nothing."""

RETRY_BASE_S = 0.5
RETRY_CAP_S = 30.0
"""Delay before a replica that failed under us (stalled, disk full, disk error) is tried again. The first
failure costs none; each following one doubles, so that a sick replica does not make clients stall every
second."""

NO_SPACE_RETRY_S = 1.0
"""A full disk is tried again no sooner than this, also the first time."""

STABLE_AFTER_S = 30.0
"""A replica that stayed in sync this long starts again without delay at its next failure."""

PULL_RETRY_S = 0.5
"""After all sources of a resync failed. One that died is found out by its session sooner."""

WANTED_CALLS_IN_FLIGHT_MAX = 8
"""Pull calls of one region each, for requests that wait. They do not queue behind the background."""

WANTED_MAX = 4096
"""Regions that requests wait for, remembered in order. Past it the background gets there anyway."""

DETACH_DRAIN_WAIT_S = 5.0
"""Requests under way at a detach get this long; then the engine closes without cleaning, which costs the
next open a reconcile but loses nothing that was acknowledged."""

CLIENTS_MAX = 1024
"""NBD connections of one volume. A client uses at most 16; each costs a few KiB in the data plane."""

HANDSHAKES_MAX = 64
"""Negotiations at once. Further clients wait in the listening socket's backlog, each at most
HANDSHAKE_TIMEOUT_S times the number of such batches before it."""

CONTROL_CONNECTIONS_MAX = 32
"""Of the engine's own control socket (mode 0600): the daemon and a few tools."""

ACCEPT_RETRY_S = 0.2
"""After accept failed for want of descriptors or memory. Not a busy loop."""

assert CALL_TIMEOUT_S >= LINK_STALL_TIMEOUT_S
assert CONNECT_TIMEOUT_S <= HANDSHAKE_TIMEOUT_S
