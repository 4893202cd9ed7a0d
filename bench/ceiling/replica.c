/* One replica: a file behind a TCP socket.
 *
 * One thread, one epoll loop. A turn is one read of at most BATCH_BYTES, one pwrite or pread per request in
 * it, and one send of all answers. A payload longer than a batch is written as it arrives, so that it is
 * still in the processor's cache. (sendfile would save reads a copy, but a page that changes while it is in
 * flight mixes two writes in one block, which no volume may do.)
 */
#define _GNU_SOURCE
#include "ceiling.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

/* Answers that wait for the engine to read: past this no more requests are taken. */
#define OUT_BYTES_MAX (4u << 20)
#define OUT_CAPACITY (OUT_BYTES_MAX + PAYLOAD_BYTES_MAX + REPLY_BYTES)

/* Largest single pwrite. The kernel makes page-cache folios as large as the write that first touches them,
 * and ext4 walks all 4 KiB buffers of a folio at every later write into it. Measured on 6.18, processor time
 * for a random 4 KiB write into what was filled with pieces of 256, 64, 32, 16 KiB: 27, 26, 25, 23 us; for
 * 1 MiB in a row: 2.1, 2.2, 2.2, 2.6 ms. (Pieces of 1 MiB more than double the first.) */
#define WRITE_BYTES_MAX (32u << 10)

struct replica {
    int fd;
    int file;
    uint64_t size_bytes;
    uint8_t *in;
    size_t in_start, in_end;
    uint8_t *out;
    size_t out_start, out_end;
    bool out_blocked;
    /* The write whose payload is arriving; payload_left is 0 between requests. */
    uint64_t cookie;
    uint64_t payload_offset;
    uint32_t payload_left;
    uint32_t error;
};

static void send_answers(struct replica *r) {
    while (r->out_start < r->out_end) {
        ssize_t n = send(r->fd, r->out + r->out_start, r->out_end - r->out_start, MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) break;
            exit(0); /* the engine is gone */
        }
        r->out_start += (size_t)n;
    }
    r->out_blocked = r->out_start < r->out_end;
    if (!r->out_blocked) r->out_start = r->out_end = 0;
}

/* Room for one answer with `length` bytes of data. */
static uint8_t *answer(struct replica *r, uint64_t cookie, uint32_t error, size_t length) {
    size_t need = REPLY_BYTES + length;
    if (r->out_end + need > OUT_CAPACITY) {
        memmove(r->out, r->out + r->out_start, r->out_end - r->out_start);
        r->out_end -= r->out_start;
        r->out_start = 0;
    }
    uint8_t *p = r->out + r->out_end;
    put32(p, NBD_REPLY_MAGIC);
    put32(p + 4, error);
    put64(p + 8, cookie);
    r->out_end += need;
    return p + REPLY_BYTES;
}

static uint32_t pwrite_all(int fd, const uint8_t *p, size_t n, uint64_t offset) {
    while (n) {
        ssize_t done = pwrite(fd, p, n < WRITE_BYTES_MAX ? n : WRITE_BYTES_MAX, (off_t)offset);
        if (done <= 0) return EIO;
        p += done;
        n -= (size_t)done;
        offset += (uint64_t)done;
    }
    return 0;
}

static void read_blocks(struct replica *r, uint64_t cookie, uint64_t offset, uint32_t length) {
    /* The engine checked the range. A short or failed read ends the program: the length is promised. */
    uint8_t *p = answer(r, cookie, 0, length);
    for (uint32_t done = 0; done < length;) {
        ssize_t n = pread(r->file, p + done, length - done, (off_t)(offset + done));
        if (n <= 0) die("pread");
        done += (uint32_t)n;
    }
    if (r->out_end - r->out_start >= BATCH_BYTES && !r->out_blocked) send_answers(r);
}

/* Takes requests until the input ends or too many answers wait. */
static void serve_input(struct replica *r) {
    while (r->out_end - r->out_start < OUT_BYTES_MAX) {
        size_t have = r->in_end - r->in_start;
        if (r->payload_left) {
            size_t n = have < r->payload_left ? have : r->payload_left;
            if (n == 0) break;
            if (!r->error) r->error = pwrite_all(r->file, r->in + r->in_start, n, r->payload_offset);
            r->in_start += n;
            r->payload_offset += n;
            r->payload_left -= (uint32_t)n;
            if (r->payload_left == 0) answer(r, r->cookie, r->error, 0);
            continue;
        }
        if (have < REQUEST_BYTES) break;
        const uint8_t *p = r->in + r->in_start;
        if (get32(p) != NBD_REQUEST_MAGIC) die("replica: request");
        uint16_t type = get16(p + 6);
        uint64_t cookie = get64(p + 8), offset = get64(p + 16);
        uint32_t length = get32(p + 24);
        r->in_start += REQUEST_BYTES;
        if (type == NBD_CMD_WRITE) {
            r->cookie = cookie;
            r->payload_offset = offset;
            r->payload_left = length;
            r->error = 0;
        } else if (type == NBD_CMD_READ) {
            read_blocks(r, cookie, offset, length);
        } else {
            answer(r, cookie, fdatasync(r->file) < 0 ? EIO : 0, 0);
        }
    }
    if (r->in_start == r->in_end) {
        r->in_start = r->in_end = 0;
    } else if (BATCH_BYTES - r->in_end < REQUEST_BYTES) {
        memmove(r->in, r->in + r->in_start, r->in_end - r->in_start);
        r->in_end -= r->in_start;
        r->in_start = 0;
    }
}

static void receive(struct replica *r) {
    if (r->in_end == BATCH_BYTES) return; /* held back until answers leave */
    ssize_t n = recv(r->fd, r->in + r->in_end, BATCH_BYTES - r->in_end, 0);
    if (n == 0) exit(0);
    if (n < 0) {
        if (errno == EAGAIN || errno == EINTR) return;
        exit(0);
    }
    r->in_end += (size_t)n;
}

void replica_main(int listener, int file, uint64_t size_bytes) {
    struct replica r = {.file = file, .size_bytes = size_bytes};
    r.fd = accept(listener, NULL, NULL);
    if (r.fd < 0) die("accept");
    close(listener);
    int one = 1;
    setsockopt(r.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    set_nonblocking(r.fd);
    r.in = malloc(BATCH_BYTES);
    r.out = malloc(OUT_CAPACITY);
    int epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!r.in || !r.out || epoll < 0) die("replica");
    struct epoll_event event = {.events = EPOLLIN};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, r.fd, &event) < 0) die("epoll_ctl");
    for (bool was_blocked = false;;) {
        if (epoll_wait(epoll, &event, 1, -1) < 0) {
            if (errno == EINTR) continue;
            die("epoll_wait");
        }
        if (event.events & EPOLLOUT) send_answers(&r);
        if (event.events & (EPOLLIN | EPOLLHUP | EPOLLERR)) receive(&r);
        serve_input(&r);
        if (!r.out_blocked) send_answers(&r);
        if (r.out_blocked != was_blocked) {
            was_blocked = r.out_blocked;
            /* While answers wait, nothing is read: the engine's own sends are what fills up then. */
            struct epoll_event wanted = {.events = was_blocked ? EPOLLOUT : EPOLLIN};
            epoll_ctl(epoll, EPOLL_CTL_MOD, r.fd, &wanted);
        }
    }
}
