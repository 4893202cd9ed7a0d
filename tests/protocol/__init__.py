"""What travels between processes: round trips, golden bytes, hostile bytes, and the tables of PROTOCOL.md."""
