/* sandbox_init_with_parameters, sandbox_free_error, sandbox_check. Source: WebKit's SandboxSPI.h. */
#include "fake.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define MAX_ERRORS 64
#define FILTER_PATH 1

const int SANDBOX_CHECK_NO_REPORT = 0x40000000;

static char *errors[MAX_ERRORS];
static int wrong_frees;
static int confined_pid = -1;
static char confined_marker[1024];
static int confined_everything;

/* A process has a sandbox that lets it read this one path, or with "" everything. */
void fake_confine(int pid, const char *marker) {
    confined_pid = pid;
    confined_everything = marker[0] == 0;
    strncpy(confined_marker, marker, sizeof confined_marker - 1);
}

int fake_outstanding_errors(void) {
    int count = 0;
    for (int i = 0; i < MAX_ERRORS; i++) count += errors[i] != NULL;
    return count;
}

int fake_wrong_frees(void) { return wrong_frees; }

static void say(char **errorbuf, const char *message) {
    for (int i = 0; i < MAX_ERRORS; i++) {
        if (errors[i] == NULL) {
            *errorbuf = errors[i] = strdup(message);
            return;
        }
    }
    abort();
}

int sandbox_init_with_parameters(const char *profile, uint64_t flags, const char *const parameters[],
                                 char **errorbuf) {
    int count = 0;
    *errorbuf = NULL;
    keep(profile);
    for (; parameters[count]; count++) keep(parameters[count]);
    record("sandbox_init_with_parameters %zu %llu %d", strlen(profile), (unsigned long long)flags, count);
    int failed = failing("sandbox_init_with_parameters");
    if (fake_script_message[0]) say(errorbuf, fake_script_message);
    if (failed) return -1;
    if (live_folder == NULL) return 0;
    int result = live_enter(profile, parameters);
    if (result != 0 && fake_script_message[0]) say(errorbuf, fake_script_message);
    return result;
}

void sandbox_free_error(char *errorbuf) {
    for (int i = 0; i < MAX_ERRORS; i++) {
        if (errorbuf != NULL && errors[i] == errorbuf) {
            errors[i] = NULL;
            free(errorbuf);
            return;
        }
    }
    wrong_frees++;
}

int sandbox_check(pid_t pid, const char *operation, int type, ...) {
    char path[4096] = "";
    if ((type & ~SANDBOX_CHECK_NO_REPORT) != 0) {
        va_list arguments;
        va_start(arguments, type);
        strncpy(path, va_arg(arguments, const char *), sizeof path - 1);
        va_end(arguments);
        keep(path);
    }
    if (live_folder == NULL) record("sandbox_check %d %s %#x", (int)pid, operation ? operation : "-", (unsigned)type);
    if (failing("sandbox_check")) return -1;
    if (live_folder != NULL) {
        long sandbox = live_sandbox(pid);
        if (sandbox < 0) return -1;
        if (sandbox == 0 || operation == NULL) return sandbox != 0;
        return !live_marker_is(sandbox, path);
    }
    if (pid != confined_pid || operation == NULL) return pid == confined_pid;
    if (confined_everything) return 0;
    return !((type & ~SANDBOX_CHECK_NO_REPORT) == FILTER_PATH && strcmp(path, confined_marker) == 0);
}
