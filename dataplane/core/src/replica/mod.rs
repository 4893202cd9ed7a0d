//! The replica side: the store, its sessions, the resync puller.
