/* The network: each attempt sends its own name, and whoever listens outside tells which names arrived. */
#include "attack.h"

#include <arpa/inet.h>
#include <linux/if_alg.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#define MPTCP 262
#define SMC 256
#define FAMILY_SMC 43
#define SERVE_MS 400

static struct sockaddr_in loopback(const char *port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(number(port))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static int say_name(int fd, const char *name)
{
    char *line = text("%s\n", name);
    return send(fd, line, strlen(line), MSG_NOSIGNAL) < 0 ? errno : 0;
}

static int connect_to(const char *port, int protocol, const char *name)
{
    struct sockaddr_in address = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, protocol);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return errno;
    return say_name(fd, name);
}

static int tcp(void) { return connect_to("tcp", 0, "tcp"); }
static int tcp_nats(void) { return connect_to("nats", 0, "tcp_nats"); }
static int mptcp(void) { return connect_to("tcp", MPTCP, "mptcp"); }

/* Shared memory beside TCP, which it opens by itself; by its own family, as a protocol, and laid over a TCP socket. */
static int smc(void) { return connect_to("tcp", SMC, "smc"); }

static int smc_by_family(void)
{
    struct sockaddr_in address = loopback("tcp");
    int fd = socket(FAMILY_SMC, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return errno;
    return say_name(fd, "smc_by_family");
}

static int smc_over_tcp(void)
{
    struct sockaddr_in address = loopback("tcp");
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_ULP, "smc", 3) < 0 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return errno;
    return say_name(fd, "smc_over_tcp");
}

static int tcp_by_ipv6(void)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(number("tcp"))};
    inet_pton(AF_INET6, "::ffff:127.0.0.1", &address.sin6_addr);
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return errno;
    return say_name(fd, "tcp_by_ipv6");
}

static int tcp_while_sending(void)
{
    struct sockaddr_in address = loopback("tcp");
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    char line[] = "tcp_while_sending\n";
    return fd < 0 || sendto(fd, line, strlen(line), MSG_FASTOPEN, (struct sockaddr *)&address, sizeof address) < 0
               ? errno
               : 0;
}

static int tcp_while_sending_many(void)
{
    struct sockaddr_in address = loopback("tcp");
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    char line[] = "tcp_while_sending_many\n";
    struct iovec part = {line, strlen(line)};
    struct mmsghdr message = {.msg_hdr = {&address, sizeof address, &part, 1, NULL, 0, 0}};
    return fd < 0 || sendmmsg(fd, &message, 1, MSG_FASTOPEN) < 0 ? errno : 0;
}

/* The option lets connect(2) return before anything was checked or sent. */
static int tcp_while_writing(void)
{
    struct sockaddr_in address = loopback("tcp");
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &on, sizeof on) < 0 ||
        connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
        return errno;
    return say_name(fd, "tcp_while_writing");
}

static int udp(void)
{
    struct sockaddr_in address = loopback("udp");
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    return fd < 0 || sendto(fd, "udp\n", 4, 0, (struct sockaddr *)&address, sizeof address) < 0 ? errno : 0;
}

static int udp_by_ipv6(void)
{
    struct sockaddr_in6 address = {.sin6_family = AF_INET6, .sin6_port = htons(number("udp"))};
    inet_pton(AF_INET6, "::ffff:127.0.0.1", &address.sin6_addr);
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    return fd < 0 || sendto(fd, "udp_by_ipv6\n", 12, 0, (struct sockaddr *)&address, sizeof address) < 0 ? errno : 0;
}

/* Serve whoever comes: somebody outside connects to every port that is new. */
static int wait_for_guests(int fd)
{
    struct pollfd waiting = {fd, POLLIN, 0};
    if (poll(&waiting, 1, SERVE_MS) <= 0)
        return ETIMEDOUT;
    return accept(fd, NULL, NULL) < 0 ? errno : 0;
}

static int serve(void)
{
    struct sockaddr_in address = loopback("free");
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) < 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 1) < 0)
        return errno;
    return wait_for_guests(fd);
}

/* Listening on a socket that was never bound gives it a port, and no bind(2) is there to be refused. */
static int serve_unbound(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    return fd < 0 || listen(fd, 1) < 0 ? errno : wait_for_guests(fd);
}

static int ask_netlink(int protocol, void *request, size_t length, const void *wanted, size_t size)
{
    char answer[65536];
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol);
    if (fd < 0 || send(fd, request, length, 0) < 0)
        return errno;
    for (struct pollfd waiting = {fd, POLLIN, 0}; poll(&waiting, 1, 200) > 0;) {
        ssize_t got = recv(fd, answer, sizeof answer, 0);
        struct nlmsghdr *head = (struct nlmsghdr *)answer;
        if (got < (ssize_t)sizeof *head)
            break;
        if (head->nlmsg_type == NLMSG_ERROR)
            return -((struct nlmsgerr *)NLMSG_DATA(head))->error;
        if (wanted && memmem(answer, got, wanted, size))
            return 0;
        if (head->nlmsg_type == NLMSG_DONE)
            break;
    }
    return ENODATA;
}

/* 10.11.12.13 is an address of the machine outside. */
static int see_addresses(void)
{
    struct {
        struct nlmsghdr head;
        struct ifaddrmsg body;
    } request = {{sizeof request, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0}, {.ifa_family = AF_INET}};
    unsigned char wanted[] = {10, 11, 12, 13};
    return ask_netlink(NETLINK_ROUTE, &request, sizeof request, wanted, sizeof wanted);
}

static int change_address(int what)
{
    struct {
        struct nlmsghdr head;
        struct ifaddrmsg body;
        struct rtattr attribute;
        unsigned char address[4];
    } request = {
        {sizeof request, what, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, 1, 0},
        {.ifa_family = AF_INET, .ifa_prefixlen = 32, .ifa_index = 1},
        {RTA_LENGTH(4), IFA_LOCAL},
        {10, 11, 12, 99},
    };
    return ask_netlink(NETLINK_ROUTE, &request, sizeof request, NULL, 0);
}

/* And away with it again. What is seen of the machine outside tells whose network it was. */
static int add_address(void)
{
    int result = change_address(RTM_NEWADDR);
    if (result)
        return result;
    result = see_addresses();
    change_address(RTM_DELADDR);
    return result;
}

/* The hosts' TCP sockets, by their ports. */
static int see_sockets(void)
{
    char line[512], *wanted = text("0100007F:%04lX", number("tcp"));
    FILE *table = fopen("/proc/net/tcp", "r");
    if (!table)
        return errno;
    int result = ENOENT;
    while (fgets(line, sizeof line, table))
        if (strstr(line, wanted))
            result = 0;
    fclose(table);
    return result;
}

static int open_raw(void) { return socket(AF_INET, SOCK_RAW, IPPROTO_ICMP) < 0 ? errno : 0; }
static int open_packet(void) { return socket(AF_PACKET, SOCK_RAW, htons(3)) < 0 ? errno : 0; }
static int open_uevents(void) { return socket(AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) < 0 ? errno : 0; }
static int open_diagnosis(void) { return socket(AF_NETLINK, SOCK_DGRAM, NETLINK_SOCK_DIAG) < 0 ? errno : 0; }

/* Only made: what is at the other end is the machine's own host. */
static int open_vsock(void) { return socket(AF_VSOCK, SOCK_STREAM, 0) < 0 ? errno : 0; }

static int use_kernel_ciphers(void)
{
    struct sockaddr_alg address = {.salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256"};
    int fd = socket(AF_ALG, SOCK_SEQPACKET, 0);
    return fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 ? errno : 0;
}

static int open_other_families(void)
{
    int types[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET}, found = 0;
    for (int family = 0; family < 48; family++)
        for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
            if (family == AF_UNIX || family == AF_INET || family == AF_INET6 || family == AF_NETLINK)
                continue;
            int fd = socket(family, types[i], 0);
            if (fd < 0)
                continue;
            close(fd);
            say("%d/%d ", family, types[i]);
            found = 1;
        }
    return found ? 0 : EAFNOSUPPORT;
}

const struct attempt network_attempts[] = {
    {"tcp", tcp, 0},
    {"tcp_nats", tcp_nats, 0},
    {"mptcp", mptcp, 0},
    {"smc", smc, 0},
    {"smc_by_family", smc_by_family, 0},
    {"smc_over_tcp", smc_over_tcp, 0},
    {"tcp_by_ipv6", tcp_by_ipv6, 0},
    {"tcp_while_sending", tcp_while_sending, 0},
    {"tcp_while_sending_many", tcp_while_sending_many, 0},
    {"tcp_while_writing", tcp_while_writing, 0},
    {"udp", udp, 0},
    {"udp_by_ipv6", udp_by_ipv6, 0},
    {"serve", serve, 0},
    {"serve_unbound", serve_unbound, 0},
    {"see_addresses", see_addresses, 0},
    {"add_address", add_address, 0},
    {"see_sockets", see_sockets, 1},
    {"open_raw", open_raw, 0},
    {"open_packet", open_packet, 0},
    {"open_uevents", open_uevents, 0},
    {"open_diagnosis", open_diagnosis, 0},
    {"open_vsock", open_vsock, 0},
    {"use_kernel_ciphers", use_kernel_ciphers, 0},
    {"open_other_families", open_other_families, 0},
    {0},
};

static int address_of(struct sockaddr_un *address, const char *path, int abstract)
{
    *address = (struct sockaddr_un){.sun_family = AF_UNIX};
    snprintf(address->sun_path + abstract, sizeof address->sun_path - abstract, "%s", path);
    return offsetof(struct sockaddr_un, sun_path) + abstract + strlen(path) + !abstract;
}

static int unix_to(const char *path, int type, int abstract, const char *name)
{
    struct sockaddr_un address;
    int length = address_of(&address, path, abstract), fd = socket(AF_UNIX, type, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, length) < 0)
        return errno;
    return say_name(fd, name);
}

static int unix_stream(void) { return unix_to(outside("stream.sock"), SOCK_STREAM, 0, "unix_stream"); }
static int unix_datagram(void) { return unix_to(outside("datagram.sock"), SOCK_DGRAM, 0, "unix_datagram"); }
static int unix_packets(void) { return unix_to(outside("packets.sock"), SOCK_SEQPACKET, 0, "unix_packets"); }
static int abstract_stream(void) { return unix_to(param("abstract"), SOCK_STREAM, 1, "abstract_stream"); }

static int abstract_datagram(void)
{
    return unix_to(text("%s.datagram", param("abstract")), SOCK_DGRAM, 1, "abstract_datagram");
}

/* One end of a pair of datagram sockets can be turned to any name. */
static int unix_pair_turned(void)
{
    struct sockaddr_un address;
    int ends[2], length = address_of(&address, outside("datagram.sock"), 0);
    char line[] = "unix_pair_turned\n";
    if (socketpair(AF_UNIX, SOCK_DGRAM, 0, ends) < 0)
        return errno;
    return sendto(ends[0], line, strlen(line), 0, (struct sockaddr *)&address, length) < 0 ? errno : 0;
}

static int make_socket(void)
{
    struct sockaddr_un address;
    int length = address_of(&address, outside("planted.sock"), 0), fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return fd < 0 || bind(fd, (struct sockaddr *)&address, length) < 0 ? errno : 0;
}

static int exchange(char *answer, size_t size)
{
    struct sockaddr_un address;
    unsigned char greeting[4096];
    size_t sent = 0;
    for (const char *hex = param("greeting"); hex[0] && hex[1] && sent < sizeof greeting; hex += 2)
        sscanf(hex, "%2hhx", &greeting[sent++]);
    int length = address_of(&address, text("%s/launcher.sock", param("data")), 0), fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, length) < 0 || send(fd, greeting, sent, MSG_NOSIGNAL) < 0)
        return errno;
    ssize_t got = recv(fd, answer, size - 1, 0);
    if (got < 0)
        return errno;
    answer[got] = 0;
    return got ? 0 : ECONNRESET;
}

/* With the right key even, which it cannot have. */
static int command_launcher(void)
{
    char answer[4096];
    int result = exchange(answer, sizeof answer);
    if (result)
        return result;
    if (!memmem(answer, sizeof answer, "\"ok\"", 4))
        return EACCES;
    say("obeyed");
    return 0;
}

const struct attempt socket_attempts[] = {
    {"unix_stream", unix_stream, 0},
    {"unix_datagram", unix_datagram, 0},
    {"unix_packets", unix_packets, 0},
    {"abstract_stream", abstract_stream, 0},
    {"abstract_datagram", abstract_datagram, 0},
    {"unix_pair_turned", unix_pair_turned, 0},
    {"make_socket", make_socket, 0},
    {"command_launcher", command_launcher, 0},
    {0},
};
