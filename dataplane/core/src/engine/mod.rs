//! The engine side: NBD transmission and fan-out to replicas.
