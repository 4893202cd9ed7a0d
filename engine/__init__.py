"""One attached volume: membership, resync, the NBD front door, the process. Sibling of replica."""
