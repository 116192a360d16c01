/* The record and the script. One test at a time uses them, in one thread. */
#include "fake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MAX 1024

static char *calls[MAX], *texts[MAX];
static int call_count, text_count;
static char function_to_fail[64];
static int failures_left;

int fake_script_number;
char fake_script_message[512];
const char *live_folder;

void record(const char *format, ...) {
    char line[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (live_folder == NULL) {
        if (call_count < MAX) calls[call_count++] = strdup(line);
        return;
    }
    char path[4200], entry[1100];
    snprintf(path, sizeof path, "%s/calls", live_folder);
    int length = snprintf(entry, sizeof entry, "%d %s\n", (int)getpid(), line);
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0) {
        if (write(fd, entry, (size_t)length) != length) abort();
        close(fd);
    }
}

void keep(const char *text) {
    if (live_folder == NULL && text_count < MAX) texts[text_count++] = strdup(text);
}

int failing(const char *function) {
    if (failures_left == 0 || strcmp(function_to_fail, function) != 0) return 0;
    failures_left--;
    errno = fake_script_number;
    return 1;
}

/* The next `times` calls of `function` fail with this errno, and say this where they can. */
void fake_fail(const char *function, int number, const char *message, int times) {
    snprintf(function_to_fail, sizeof function_to_fail, "%s", function);
    snprintf(fake_script_message, sizeof fake_script_message, "%s", message);
    fake_script_number = number;
    failures_left = times;
}

void fake_reset(void) {
    while (call_count > 0) free(calls[--call_count]);
    while (text_count > 0) free(texts[--text_count]);
    failures_left = 0;
    fake_script_message[0] = 0;
}

int fake_call_count(void) { return call_count; }
const char *fake_call(int index) { return calls[index]; }
int fake_text_count(void) { return text_count; }
const char *fake_text(int index) { return texts[index]; }

/* From now on processes and sandboxes are those of this system; calls are noted in `folder`/calls. */
void fake_live(const char *folder) { live_folder = strdup(folder); }
