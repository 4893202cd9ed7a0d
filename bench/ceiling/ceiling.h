/* What the engine and the replicas of the ceiling program share.
 *
 * The ceiling program answers one question: how fast can three copies over TCP be on this machine when
 * nothing is done but moving the bytes? It has no checksums, no block map, no dirty log, no membership and
 * survives nothing. It is not storage; it is the bar that storage is measured against.
 *
 * The engine speaks to its replicas in the NBD transmission format itself: a request or reply is forwarded
 * from the very bytes it arrived in, with only the cookie changed. So nothing is copied in user space, and a
 * batch of requests that arrived together leaves as one piece of memory.
 */
#ifndef CEILING_H
#define CEILING_H

#include <endian.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NBD_REQUEST_MAGIC 0x25609513u
#define NBD_REPLY_MAGIC 0x67446698u
#define NBD_CMD_READ 0
#define NBD_CMD_WRITE 1
#define NBD_CMD_DISC 2
#define NBD_CMD_FLUSH 3

/* u32 magic, u16 flags, u16 type, u64 cookie, u64 offset, u32 length */
#define REQUEST_BYTES 28
/* u32 magic, u32 error, u64 cookie */
#define REPLY_BYTES 16

/* Largest READ or WRITE; advertised. The largest request of the benchmark. */
#define PAYLOAD_BYTES_MAX (1u << 20)

#define REPLICA_COUNT 3

/* One read takes at most this much when requests are small: a batch of 60 requests of 4 KiB. It also stays
 * well inside a second-level cache. */
#define BATCH_BYTES (256u << 10)

static inline uint16_t get16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return be16toh(v); }
static inline uint32_t get32(const uint8_t *p) { uint32_t v; memcpy(&v, p, 4); return be32toh(v); }
static inline uint64_t get64(const uint8_t *p) { uint64_t v; memcpy(&v, p, 8); return be64toh(v); }
static inline void put16(uint8_t *p, uint16_t v) { v = htobe16(v); memcpy(p, &v, 2); }
static inline void put32(uint8_t *p, uint32_t v) { v = htobe32(v); memcpy(p, &v, 4); }
static inline void put64(uint8_t *p, uint64_t v) { v = htobe64(v); memcpy(p, &v, 8); }

/* Prints and ends the process: the benchmark reports a failed measurement. */
void die(const char *what) __attribute__((noreturn));
void set_nonblocking(int fd);
uint64_t now_us(void);

/* Set by SIGTERM and SIGINT. */
extern volatile bool stop_asked;

/* Serves one replica's file to the engine that connects to `listener`. Ends when the engine is gone. */
void replica_main(int listener, int file, uint64_t size_bytes) __attribute__((noreturn));

/* Serves NBD clients of `listener` until stop_asked, over the connected `peers`. */
void engine_main(int listener, const int peers[REPLICA_COUNT], uint64_t size_bytes, unsigned spin_us);

#endif
