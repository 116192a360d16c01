/* What the parts of the attack program share; attack.c says what it is. */
#ifndef ATTACK_H
#define ATTACK_H

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

/* What an attempt returns: 0 when it got through as far as it can tell, the errno of the refusal, or this, having
 * said why, when the kernel, the machine or the user has no such thing. */
#define UNAVAILABLE (-1)

struct attempt {
    const char *name;
    int (*act)(void);
    int in_first; /* by the program's first process, and not by a child of it */
};

extern const struct attempt file_attempts[], metadata_attempts[], system_attempts[], program_attempts[],
    process_attempts[], memory_attempts[], network_attempts[], socket_attempts[], ipc_attempts[], kernel_attempts[],
    mount_attempts[], leak_attempts[];

/* A parameter `name=value` of the command line; "" when it was not given. */
const char *param(const char *name);
long number(const char *name);

/* Add to what the attempt has to show for itself. */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void say_bytes(const void *bytes, size_t length);

/* Paths in memory of their own: of a file in the folder that belongs to others, and in the program's own. */
char *outside(const char *name);
char *own(const char *name);
char *text(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Say what a file holds: 0 or errno. */
int show_file(const char *path);
int show_descriptor(int fd);
int write_file(const char *path, int flags, const char *content);

/* 0 for a call that worked, or that failed only with `expected`: then it was let in, and found nothing to do. */
int let_in(long result, int expected);

/* Run a program in a child, its output said; 0 when it ended well, else its exit status, or errno. */
int run_program(const char *path, char *const argv[]);

/* Signals that the victim counts, from SIGRTMIN on. */
enum { BY_KILL = 1, BY_TGKILL, BY_QUEUE, BY_PIDFD, BY_GROUP, BY_OWNER, SIGNALS };

int be_victim(void);
int be_tree(const char *kind);

#endif
