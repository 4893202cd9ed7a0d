"""The contract between Dolmen's pieces: frames, hello, control calls, ids, errors, limits.

Owns what two processes must agree on, and nothing else. Does not own sockets, files or
policy. Imports the standard library and msgpack only, so that every process may import it.
The byte tables are in PROTOCOL.md; the Rust twin is ``dataplane/core/src/frame.rs``.
"""
