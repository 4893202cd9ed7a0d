/* The engine: NBD clients on one side, three replicas on the other, one thread and one epoll loop.
 *
 * A turn is: one read from everything that is readable, then one gathered write to everything that has
 * something to be sent. Bytes stay in the buffer they were received in until the last peer has taken them.
 * A write is acknowledged when all three replicas have answered; a read goes to the replicas in turn.
 *
 * Before sleeping the loop may look for events without sleeping for `spin_us`. It stops doing so when that
 * does not pay, so that an idle engine costs nothing.
 *
 * Only good enough for fio, libnbd and qemu as clients: the handshake blocks the loop, anything unexpected
 * closes the client, and a lost replica ends the program.
 */
#define _GNU_SOURCE
#include "ceiling.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <sched.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <unistd.h>

/* All requests in flight; clients beyond it are not read. fio's deepest workload has 128. */
#define REQUESTS_MAX 4096
/* One piece per request at most can wait on a connection; a power of two. */
#define QUEUE_MAX REQUESTS_MAX
#define CLIENTS_MAX 64
#define PIECES_PER_SEND 256
/* A read into less than this is not worth a system call: take a new chunk. */
#define ROOM_MIN (16u << 10)
/* With more than this in flight there is always work soon, and the processor is better given to the
 * replicas and the client: measured, spinning then costs 10 to 15 % of reads at depth 32. */
#define SPIN_IN_FLIGHT_MAX 2
/* Unsuccessful spins in a row double the pause until the next try, up to this many sleeps. */
#define SPIN_PAUSE_MAX 1024
/* The client sees this as slow, not as broken; a silent one must not hold the benchmark for ever. */
#define HANDSHAKE_TIMEOUT_S 5

#define SMALL_BYTES (BATCH_BYTES + 4096)
#define LARGE_BYTES (REQUEST_BYTES + PAYLOAD_BYTES_MAX)

struct chunk {
    struct chunk *next_free;
    uint32_t refs;
    uint32_t capacity;
    uint8_t data[];
};

/* What arrives on one connection. Bytes [start, end) of the chunk are an incomplete message. */
struct input {
    struct chunk *chunk;
    uint32_t start, end;
    uint32_t message_bytes; /* of the message at `start`; 0 while its header is incomplete */
    bool large;             /* the last message was: expect another */
};

struct piece {
    uint8_t *bytes;
    size_t length;
    struct chunk *chunk;
};

/* What waits to be sent on one connection. */
struct output {
    struct piece pieces[QUEUE_MAX];
    uint32_t head, count;
    bool blocked;
};

enum kind { LISTENER, PEER, CLIENT };

struct connection {
    enum kind kind;
    int fd;
    bool closed;
    bool held; /* a client that is not read because too much is in flight */
    uint32_t in_flight;
    struct input in;
    struct output out;
};

struct request {
    struct connection *client;
    uint64_t cookie;
    uint32_t read_bytes; /* 0 for writes and flushes */
    uint32_t error;
    uint32_t answers_missing;
    uint32_t next_free;
};

static struct {
    int epoll;
    uint64_t size_bytes;
    unsigned spin_us;
    unsigned spin_pause, spin_pause_left;
    unsigned next_reader;
    struct connection *peers[REPLICA_COUNT];
    struct connection *clients[CLIENTS_MAX];
    unsigned client_count;
    struct request requests[REQUESTS_MAX];
    uint32_t request_free, in_flight;
    struct chunk *free_small, *free_large;
    struct chunk *acks; /* replies to writes are made here */
    uint32_t acks_used;
    struct { uint64_t turns, sleeps, spins, spins_won, receives, sends, requests; } count;
} e;

/* ---- memory ---- */

static struct chunk *chunk_get(bool large) {
    struct chunk **list = large ? &e.free_large : &e.free_small;
    struct chunk *c = *list;
    if (c) {
        *list = c->next_free;
    } else {
        uint32_t capacity = large ? LARGE_BYTES : SMALL_BYTES;
        c = malloc(sizeof *c + capacity);
        if (!c) die("malloc");
        c->capacity = capacity;
    }
    c->refs = 1;
    return c;
}

static void chunk_put(struct chunk *c) {
    if (--c->refs) return;
    struct chunk **list = c->capacity == LARGE_BYTES ? &e.free_large : &e.free_small;
    c->next_free = *list;
    *list = c;
}

/* ---- output ---- */

static void queue(struct connection *to, struct chunk *chunk, uint8_t *bytes, size_t length) {
    struct output *out = &to->out;
    if (to->closed) return;
    if (out->count) {
        struct piece *last = &out->pieces[(out->head + out->count - 1) % QUEUE_MAX];
        if (last->chunk == chunk && last->bytes + last->length == bytes) {
            last->length += length;
            return;
        }
    }
    if (out->count == QUEUE_MAX) die("output queue");
    out->pieces[(out->head + out->count++) % QUEUE_MAX] = (struct piece){bytes, length, chunk};
    chunk->refs++;
}

static void interest(struct connection *c) {
    uint32_t events = (c->held ? 0 : EPOLLIN) | (c->out.blocked ? EPOLLOUT : 0);
    struct epoll_event event = {.events = events, .data.ptr = c};
    if (epoll_ctl(e.epoll, EPOLL_CTL_MOD, c->fd, &event) < 0) die("epoll_ctl");
}

static void drop_output(struct output *out) {
    while (out->count) {
        chunk_put(out->pieces[out->head].chunk);
        out->head = (out->head + 1) % QUEUE_MAX;
        out->count--;
    }
}

static void close_client(struct connection *c) {
    if (c->closed) return;
    c->closed = true;
    drop_output(&c->out);
    close(c->fd);
}

static void lost(struct connection *c) {
    if (c->kind == PEER) die("a replica is gone");
    close_client(c);
}

static void send_queued(struct connection *to) {
    struct output *out = &to->out;
    while (out->count) {
        struct iovec iov[PIECES_PER_SEND];
        uint32_t n = out->count < PIECES_PER_SEND ? out->count : PIECES_PER_SEND;
        size_t total = 0;
        for (uint32_t i = 0; i < n; i++) {
            struct piece *p = &out->pieces[(out->head + i) % QUEUE_MAX];
            iov[i] = (struct iovec){p->bytes, p->length};
            total += p->length;
        }
        struct msghdr message = {.msg_iov = iov, .msg_iovlen = n};
        ssize_t sent = sendmsg(to->fd, &message, MSG_NOSIGNAL);
        e.count.sends++;
        if (sent < 0 && errno != EAGAIN) return lost(to);
        bool blocked = sent < (ssize_t)total;
        while (sent > 0) {
            struct piece *p = &out->pieces[out->head];
            if ((size_t)sent < p->length) {
                p->bytes += sent;
                p->length -= (size_t)sent;
                break;
            }
            sent -= (ssize_t)p->length;
            chunk_put(p->chunk);
            out->head = (out->head + 1) % QUEUE_MAX;
            out->count--;
        }
        if (blocked) {
            if (!out->blocked) {
                out->blocked = true;
                interest(to);
            }
            return;
        }
    }
    if (out->blocked) {
        out->blocked = false;
        interest(to);
    }
}

static void queue_ack(struct connection *client, uint64_t cookie, uint32_t error) {
    if (!e.acks || e.acks_used + REPLY_BYTES > e.acks->capacity) {
        if (e.acks) chunk_put(e.acks);
        e.acks = chunk_get(false);
        e.acks_used = 0;
    }
    uint8_t *p = e.acks->data + e.acks_used;
    e.acks_used += REPLY_BYTES;
    put32(p, NBD_REPLY_MAGIC);
    put32(p + 4, error);
    put64(p + 8, cookie);
    queue(client, e.acks, p, REPLY_BYTES);
}

/* ---- input ---- */

/* Makes room for the rest of the message, or for a batch of new ones. */
static void make_room(struct input *in) {
    struct chunk *c = in->chunk;
    if (c && in->start == in->end && c->refs == 1 && (c->capacity == LARGE_BYTES) == in->large)
        in->start = in->end = 0;
    bool fits = c && (in->message_bytes ? in->start + in->message_bytes <= c->capacity
                                        : in->end + ROOM_MIN <= c->capacity);
    if (fits) return;
    struct chunk *next = chunk_get(in->large || in->message_bytes > SMALL_BYTES);
    if (c) {
        memcpy(next->data, c->data + in->start, in->end - in->start);
        chunk_put(c);
    }
    in->chunk = next;
    in->end -= in->start;
    in->start = 0;
}

/* One read. False: nothing came, or the connection is lost. */
static bool receive(struct connection *from) {
    struct input *in = &from->in;
    make_room(in);
    ssize_t n = recv(from->fd, in->chunk->data + in->end, in->chunk->capacity - in->end, 0);
    e.count.receives++;
    if (n > 0) {
        in->end += (uint32_t)n;
        return true;
    }
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return false;
    lost(from);
    return false;
}

static void message_done(struct input *in) {
    in->start += in->message_bytes;
    in->large = in->message_bytes > BATCH_BYTES;
    in->message_bytes = 0;
}

/* Forwards the request at `p`, whose bytes are all here. */
static void start_request(struct connection *client, uint8_t *p) {
    struct chunk *chunk = client->in.chunk;
    uint16_t type = get16(p + 6);
    uint32_t length = get32(p + 24);
    uint32_t id = e.request_free;
    struct request *r = &e.requests[id];
    e.request_free = r->next_free;
    e.in_flight++;
    e.count.requests++;
    client->in_flight++;
    *r = (struct request){.client = client, .cookie = get64(p + 8)};
    put64(p + 8, id);
    if (type == NBD_CMD_READ) {
        r->read_bytes = length;
        r->answers_missing = 1;
        queue(e.peers[e.next_reader], chunk, p, REQUEST_BYTES);
        e.next_reader = (e.next_reader + 1) % REPLICA_COUNT;
        return;
    }
    r->answers_missing = REPLICA_COUNT;
    size_t bytes = REQUEST_BYTES + (type == NBD_CMD_WRITE ? length : 0);
    for (int i = 0; i < REPLICA_COUNT; i++) queue(e.peers[i], chunk, p, bytes);
}

static void take_requests(struct connection *client) {
    struct input *in = &client->in;
    while (!client->closed && in->end - in->start >= REQUEST_BYTES) {
        uint8_t *p = in->chunk->data + in->start;
        uint16_t type = get16(p + 6);
        uint64_t offset = get64(p + 16);
        uint32_t length = get32(p + 24);
        bool data = type == NBD_CMD_READ || type == NBD_CMD_WRITE;
        if (get32(p) != NBD_REQUEST_MAGIC || (!data && type != NBD_CMD_FLUSH) ||
            (data && (length == 0 || length > PAYLOAD_BYTES_MAX || length > e.size_bytes ||
                      offset > e.size_bytes - length)))
            return close_client(client); /* DISC ends here too */
        in->message_bytes = REQUEST_BYTES + (type == NBD_CMD_WRITE ? length : 0);
        if (in->end - in->start < in->message_bytes) return;
        if (e.in_flight == REQUESTS_MAX) {
            client->held = true;
            return interest(client);
        }
        start_request(client, p);
        message_done(in);
    }
}

static void finish_request(struct connection *peer, uint8_t *p) {
    uint64_t id = get64(p + 8);
    struct request *r = &e.requests[id];
    r->error |= get32(p + 4);
    if (--r->answers_missing) return;
    if (r->read_bytes) {
        put64(p + 8, r->cookie);
        queue(r->client, peer->in.chunk, p, REPLY_BYTES + r->read_bytes);
    } else {
        queue_ack(r->client, r->cookie, r->error);
    }
    r->client->in_flight--;
    r->client = NULL;
    r->next_free = e.request_free;
    e.request_free = (uint32_t)id;
    e.in_flight--;
}

static void take_answers(struct connection *peer) {
    struct input *in = &peer->in;
    while (in->end - in->start >= REPLY_BYTES) {
        uint8_t *p = in->chunk->data + in->start;
        uint64_t id = get64(p + 8);
        errno = 0;
        if (get32(p) != NBD_REPLY_MAGIC || id >= REQUESTS_MAX || !e.requests[id].client) die("answer");
        in->message_bytes = REPLY_BYTES + e.requests[id].read_bytes;
        if (in->end - in->start < in->message_bytes) return;
        finish_request(peer, p);
        message_done(in);
    }
}

/* ---- clients ---- */

static bool read_all(int fd, void *p, size_t n) { return recv(fd, p, n, MSG_WAITALL) == (ssize_t)n; }
static bool write_all(int fd, const void *p, size_t n) { return send(fd, p, n, MSG_NOSIGNAL) == (ssize_t)n; }

static bool option_reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t length) {
    uint8_t p[20];
    put64(p, 0x3e889045565a9ull);
    put32(p + 8, option);
    put32(p + 12, type);
    put32(p + 16, length);
    return write_all(fd, p, sizeof p) && (length == 0 || write_all(fd, data, length));
}

/* HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN */
#define TRANSMISSION_FLAGS (1u | 1u << 2 | 1u << 8)

static bool option_go(int fd, uint32_t option) {
    uint8_t export[12], block_size[14];
    put16(export, 0);
    put64(export + 2, e.size_bytes);
    put16(export + 10, TRANSMISSION_FLAGS);
    put16(block_size, 3);
    put32(block_size + 2, 1);
    put32(block_size + 6, 4096);
    put32(block_size + 10, PAYLOAD_BYTES_MAX);
    return option_reply(fd, option, 3, export, sizeof export) &&
           option_reply(fd, option, 3, block_size, sizeof block_size) && option_reply(fd, option, 1, NULL, 0);
}

/* Fixed newstyle. Options: EXPORT_NAME, ABORT, INFO, GO; the rest is unsupported. Any export name will do. */
static bool handshake(int fd) {
    uint8_t hello[18], header[16], option_data[4096];
    memcpy(hello, "NBDMAGICIHAVEOPT", 16);
    put16(hello + 16, 3); /* FIXED_NEWSTYLE, NO_ZEROES */
    if (!write_all(fd, hello, sizeof hello) || !read_all(fd, header, 4)) return false;
    bool no_zeroes = get32(header) & 2;
    for (;;) {
        if (!read_all(fd, header, 16) || memcmp(header, "IHAVEOPT", 8) != 0) return false;
        uint32_t option = get32(header + 8), length = get32(header + 12);
        if (length > sizeof option_data || (length && !read_all(fd, option_data, length))) return false;
        if (option == 1) {
            uint8_t p[10 + 124] = {0};
            put64(p, e.size_bytes);
            put16(p + 8, TRANSMISSION_FLAGS);
            return write_all(fd, p, no_zeroes ? 10 : sizeof p);
        }
        bool ok = option == 6 || option == 7 ? option_go(fd, option)
                                             : option_reply(fd, option, option == 2 ? 1 : 0x80000001u, NULL, 0);
        if (!ok || option == 2) return false;
        if (option == 7) return true;
    }
}

static struct connection *add_connection(int fd, enum kind kind) {
    struct connection *c = calloc(1, sizeof *c);
    if (!c) die("calloc");
    c->kind = kind;
    c->fd = fd;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(e.epoll, EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
    return c;
}

static void accept_client(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0) return;
    struct timeval limit = {.tv_sec = HANDSHAKE_TIMEOUT_S};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (e.client_count == CLIENTS_MAX || !handshake(fd)) {
        close(fd);
        return;
    }
    /* Replies to large reads should not wait for the client to take the last one. */
    int bytes = 2 * (int)PAYLOAD_BYTES_MAX;
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    set_nonblocking(fd);
    e.clients[e.client_count++] = add_connection(fd, CLIENT);
}

/* Closed clients stay until their last request has been answered. */
static void sweep_clients(void) {
    for (unsigned i = 0; i < e.client_count;) {
        struct connection *c = e.clients[i];
        if (!c->closed || c->in_flight) {
            i++;
            continue;
        }
        if (c->in.chunk) chunk_put(c->in.chunk);
        free(c);
        e.clients[i] = e.clients[--e.client_count];
    }
}

/* ---- the loop ---- */

static int wait_for_events(struct epoll_event *events, int events_max) {
    if (e.spin_us && e.in_flight <= SPIN_IN_FLIGHT_MAX && e.spin_pause_left == 0) {
        uint64_t until_us = now_us() + e.spin_us;
        e.count.spins++;
        do {
            int n = epoll_wait(e.epoll, events, events_max, 0);
            if (n) {
                e.count.spins_won++;
                e.spin_pause = 0;
                return n;
            }
            sched_yield(); /* whom we wait for may share this processor */
        } while (now_us() < until_us);
        e.spin_pause = e.spin_pause ? e.spin_pause * 2 : 1;
        if (e.spin_pause > SPIN_PAUSE_MAX) e.spin_pause = SPIN_PAUSE_MAX;
        e.spin_pause_left = e.spin_pause;
    } else if (e.spin_pause_left) {
        e.spin_pause_left--;
    }
    e.count.sleeps++;
    return epoll_wait(e.epoll, events, events_max, -1);
}

static void turn(const struct epoll_event *events, int n, int listener) {
    for (int i = 0; i < n; i++) {
        struct connection *c = events[i].data.ptr;
        if (c->kind == LISTENER) {
            accept_client(listener);
            continue;
        }
        if (c->closed) continue;
        if (events[i].events & EPOLLOUT) send_queued(c);
        if (c->closed || !(events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR)) || !receive(c)) continue;
        if (c->kind == PEER) take_answers(c);
        else take_requests(c);
    }
    for (unsigned i = 0; i < e.client_count; i++) {
        struct connection *c = e.clients[i];
        if (!c->held || e.in_flight > REQUESTS_MAX / 2) continue;
        c->held = false;
        if (c->closed) continue;
        interest(c);
        take_requests(c); /* what was received before it was held */
    }
    for (int i = 0; i < REPLICA_COUNT; i++)
        if (e.peers[i]->out.count && !e.peers[i]->out.blocked) send_queued(e.peers[i]);
    bool any_closed = false;
    for (unsigned i = 0; i < e.client_count; i++) {
        struct connection *c = e.clients[i];
        if (c->out.count && !c->out.blocked) send_queued(c);
        any_closed |= c->closed;
    }
    if (any_closed) sweep_clients();
}

void engine_main(int listener, const int peers[REPLICA_COUNT], uint64_t size_bytes, unsigned spin_us) {
    e.size_bytes = size_bytes;
    e.spin_us = spin_us;
    e.epoll = epoll_create1(EPOLL_CLOEXEC);
    if (e.epoll < 0) die("epoll_create1");
    for (uint32_t i = 0; i < REQUESTS_MAX; i++) e.requests[i].next_free = i + 1;
    for (int i = 0; i < REPLICA_COUNT; i++) e.peers[i] = add_connection(peers[i], PEER);
    add_connection(listener, LISTENER);
    while (!stop_asked) {
        struct epoll_event events[CLIENTS_MAX + REPLICA_COUNT + 1];
        int n = wait_for_events(events, CLIENTS_MAX + REPLICA_COUNT + 1);
        if (n < 0) {
            if (errno == EINTR) continue;
            die("epoll_wait");
        }
        e.count.turns++;
        turn(events, n, listener);
    }
    fprintf(stderr, "requests=%lu turns=%lu sleeps=%lu spins=%lu spins_won=%lu receives=%lu sends=%lu\n",
            e.count.requests, e.count.turns, e.count.sleeps, e.count.spins, e.count.spins_won,
            e.count.receives, e.count.sends);
}
