/* The ceiling program: `ceiling --socket S --size BYTES --spin-us N FILE FILE FILE`.
 *
 * Starts three replica processes (one file each, TCP over loopback), then serves NBD on the unix socket S in
 * this process. Prints `ready engine=PID replicas=PID,PID,PID` when clients may connect. Ends on SIGTERM, on
 * SIGINT, and when its parent dies; the replicas end with it.
 *
 * Caller: bench/systems.py, which also compiles it. Method: docs/benchmarks.md.
 */
#define _GNU_SOURCE
#include "ceiling.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

volatile bool stop_asked = false;

void die(const char *what) {
    fprintf(stderr, "ceiling: %s: %s\n", what, errno ? strerror(errno) : "protocol error");
    exit(1);
}

void set_nonblocking(int fd) {
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) < 0) die("fcntl");
}

uint64_t now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

static void on_stop(int signal_number) {
    (void)signal_number;
    stop_asked = true;
}

/* Forks the replica of `path`; returns our connection to it. */
static int start_replica(const char *path, uint64_t size_bytes, pid_t *pid) {
    int file = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0) die(path);
    struct stat status;
    if (fstat(file, &status) < 0) die(path);
    if (status.st_size != (off_t)size_bytes && ftruncate(file, (off_t)size_bytes) < 0) die(path);

    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t address_size = sizeof address;
    if (listener < 0 || bind(listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(listener, 1) < 0 || getsockname(listener, (struct sockaddr *)&address, &address_size) < 0)
        die("replica socket");

    pid_t engine = getpid();
    *pid = fork();
    if (*pid < 0) die("fork");
    if (*pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != engine) _exit(1);
        replica_main(listener, file, size_bytes);
    }
    close(listener);
    close(file);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    int one = 1;
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0) die("connect to replica");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    set_nonblocking(fd);
    return fd;
}

static int listen_unix(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        die(path);
    }
    strcpy(address.sun_path, path);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 64) < 0) die(path);
    return fd;
}

int main(int argc, char **argv) {
    const char *socket_path = NULL;
    uint64_t size_bytes = 0;
    unsigned spin_us = 0;
    static const struct option options[] = {{"socket", required_argument, NULL, 's'},
                                            {"size", required_argument, NULL, 'b'},
                                            {"spin-us", required_argument, NULL, 'u'},
                                            {NULL, 0, NULL, 0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (c == 's') socket_path = optarg;
        else if (c == 'b') size_bytes = strtoull(optarg, NULL, 10);
        else if (c == 'u') spin_us = (unsigned)strtoul(optarg, NULL, 10);
        else return 2;
    }
    if (!socket_path || size_bytes == 0 || argc - optind != REPLICA_COUNT) {
        fprintf(stderr, "usage: ceiling --socket S --size BYTES [--spin-us N] FILE FILE FILE\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    struct sigaction action = {.sa_handler = on_stop};
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);

    int peers[REPLICA_COUNT];
    pid_t pids[REPLICA_COUNT];
    for (int i = 0; i < REPLICA_COUNT; i++) peers[i] = start_replica(argv[optind + i], size_bytes, &pids[i]);
    int listener = listen_unix(socket_path);
    printf("ready engine=%d replicas=%d,%d,%d\n", getpid(), pids[0], pids[1], pids[2]);
    fflush(stdout);

    engine_main(listener, peers, size_bytes, spin_us);

    unlink(socket_path);
    for (int i = 0; i < REPLICA_COUNT; i++) close(peers[i]);
    for (int i = 0; i < REPLICA_COUNT; i++) waitpid(pids[i], NULL, 0);
    return 0;
}
