/* What the parts of the stand-in share: the record of calls, and the script of failures. */
#ifndef FAKE_H
#define FAKE_H

#include <stdint.h>

/* Note a call, as printf would write it. */
void record(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Keep a text that was given, byte for byte. */
void keep(const char *text);

/* True when the test wants this call to fail; errno is set. `fake_script_message` is what it shall say. */
int failing(const char *function);
extern int fake_script_number;
extern char fake_script_message[512];

/* The folder of `fake_live`; NULL while processes are those that the test has told of. */
extern const char *live_folder;

/* Of the real system, in the shape of the scripted ones (processes.c). */
struct fake_process {
    int pid, ppid, status, threads, files, uid;
    uint64_t unique, parent_unique, user, system, footprint, bytes_read, bytes_written, start_sec, start_usec;
};
int live_find(int pid, struct fake_process *found);
int live_files(int pid);
int live_pids(int uid, int *pids, int room);
int live_outgrew(int pid);

/* The sandbox of a real process: 0 for none, -1 and errno for no such process (live.c). */
long live_sandbox(int pid);
int live_enter(const char *profile, const char *const parameters[]);
int live_marker_is(long sandbox, const char *path);

#endif
