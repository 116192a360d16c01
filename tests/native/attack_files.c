/* Files of others: reading and changing them by every way that names one. */
#include "attack.h"

#include <dirent.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#ifndef RENAME_EXCHANGE
#define RENAME_EXCHANGE 2
#endif
#define LOOKS 1000

static int read_file(void) { return show_file(outside("read_file")); }

static int read_through_link(void)
{
    char *link = own("link");
    if (symlink(outside("read_file"), link) < 0)
        return errno;
    return show_file(link);
}

static int read_upwards(void)
{
    if (chdir(param("own")) < 0)
        return errno;
    return show_file(text("../../../../../../../../../..%s", outside("read_file")));
}

static int read_through(const char *process, const char *what)
{
    return show_file(text("/proc/%s/root%s", process, outside(what)));
}

static int read_own_root(void) { return read_through("self", "read_file"); }
static int read_init_root(void) { return read_through("1", "read_file"); }
static int read_launcher_root(void) { return read_through(param("launcher"), "read_file"); }

static int read_worker_folder(void) { return show_file(text("/proc/%s/cwd/read_file", param("worker"))); }

static int list_folder(void)
{
    DIR *folder = opendir(outside("folder"));
    if (!folder)
        return errno;
    for (struct dirent *one; (one = readdir(folder));)
        say("%s ", one->d_name);
    closedir(folder);
    return 0;
}

static int read_by_handle(void)
{
    /* As made by name_to_handle_at(2), by someone who may see the file: such handles can be guessed. */
    struct {
        struct file_handle head;
        unsigned char bytes[128];
    } handle;
    const char *hex = param("handle");
    if (!*hex) {
        say("no handle could be made of a file outside");
        return UNAVAILABLE;
    }
    handle.head.handle_type = strtol(hex, (char **)&hex, 10);
    handle.head.handle_bytes = 0;
    for (hex++; hex[0] && hex[1]; hex += 2)
        sscanf(hex, "%2hhx", &handle.head.f_handle[handle.head.handle_bytes++]);
    int mount = open(param("own"), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (mount < 0)
        return errno;
    int fd = open_by_handle_at(mount, &handle.head, O_RDONLY | O_CLOEXEC);
    return fd < 0 ? errno : show_descriptor(fd);
}

static int read_by_hard_link(void)
{
    char *link = own("hard");
    if (linkat(AT_FDCWD, outside("read_by_hard_link"), AT_FDCWD, link, 0) < 0)
        return errno;
    return show_file(link);
}

static int read_after_rename(void)
{
    char *moved = own("moved");
    if (rename(outside("read_after_rename"), moved) < 0)
        return errno;
    return show_file(moved);
}

/* A folder of its own changes places with a link that leads out, while its path is opened. */
static int read_in_a_race(void)
{
    struct exchanges {
        volatile int done, failed, error;
    } *seen = mmap(NULL, sizeof *seen, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    char *folder = own("swap"), *link = own("swap-link"), *file = own("swap/read_file");
    if (seen == MAP_FAILED || mkdir(folder, 0755) < 0 || symlink(param("outside"), link) < 0)
        return errno;
    int result = write_file(file, O_WRONLY | O_CREAT, "my own");
    if (result)
        return result;
    pid_t swapper = fork();
    if (swapper < 0)
        return errno;
    if (swapper == 0)
        for (prctl(PR_SET_PDEATHSIG, SIGKILL);;)
            if (syscall(SYS_renameat2, AT_FDCWD, folder, AT_FDCWD, link, RENAME_EXCHANGE) < 0) {
                seen->error = errno;
                seen->failed++;
            } else
                seen->done++;
    result = ENOENT;
    /* Only a look after a further exchange is a new one: on a busy machine one of the two may do all of its share while
       the other waits, and a thousand looks are then the same one. */
    int looks = 0, before = -1, refused = 0;
    while (result && looks < LOOKS) {
        int now = seen->done + seen->failed;
        if (now == before) {
            sched_yield();
            continue;
        }
        before = now;
        looks++;
        char bytes[256] = "my own";
        int fd = open(file, O_RDONLY | O_CLOEXEC);
        if (fd < 0) {
            result = errno;
            refused++;
            continue;
        }
        ssize_t length = read(fd, bytes, sizeof bytes);
        close(fd);
        if (length > 0 && strncmp(bytes, "my own", 6)) {
            say_bytes(bytes, length);
            result = 0;
        }
    }
    kill(swapper, SIGKILL);
    waitpid(swapper, NULL, 0);
    if (result)
        say("%d looks, of which %d gave an error; %d exchanges, %d failed with %s", looks, refused, seen->done,
            seen->failed, strerror(seen->error));
    return result;
}

static int write_outside(void) { return write_file(outside("write_outside"), O_WRONLY, "changed"); }
static int create_outside(void) { return write_file(outside("create_outside"), O_WRONLY | O_CREAT | O_EXCL, "new"); }
static int empty_outside(void) { return truncate(outside("empty_outside"), 0) < 0 ? errno : 0; }

static int empty_while_opening(void)
{
    return open(outside("empty_while_opening"), O_RDONLY | O_TRUNC | O_CLOEXEC) < 0 ? errno : 0;
}

static int delete_outside(void) { return unlink(outside("delete_outside")) < 0 ? errno : 0; }
static int delete_folder(void) { return rmdir(outside("delete_folder")) < 0 ? errno : 0; }
static int make_folder(void) { return mkdir(outside("make_folder"), 0755) < 0 ? errno : 0; }
static int make_link(void) { return symlink("/", outside("make_link")) < 0 ? errno : 0; }
static int make_fifo(void) { return mkfifo(outside("make_fifo"), 0666) < 0 ? errno : 0; }

static int rename_outside(void)
{
    return rename(outside("rename_outside"), outside("rename_outside.new")) < 0 ? errno : 0;
}

static int rename_out(void)
{
    char *mine = own("to-rename");
    int result = write_file(mine, O_WRONLY | O_CREAT, "mine");
    if (result)
        return result;
    return rename(mine, outside("rename_out")) < 0 ? errno : 0;
}

static int hard_link_out(void)
{
    char *mine = own("to-link");
    int result = write_file(mine, O_WRONLY | O_CREAT, "mine");
    if (result)
        return result;
    return link(mine, outside("hard_link_out")) < 0 ? errno : 0;
}

static int write_readable(void) { return write_file(text("%s/write", param("readable")), O_WRONLY, "changed"); }
static int empty_readable(void) { return truncate(text("%s/empty", param("readable")), 0) < 0 ? errno : 0; }
static int delete_readable(void) { return unlink(text("%s/delete", param("readable"))) < 0 ? errno : 0; }

static int read_key(void) { return show_file(text("%s/launcher.key", param("data"))); }
static int read_journal(void) { return show_file(text("%s/worker.db", param("data"))); }
static int read_secret(void) { return show_file(text("%s/secrets/token", param("data"))); }
static int read_others_temporary(void) { return show_file("/tmp/sandfleet-attack-canary"); }

static int read_neighbours_file(void)
{
    return show_file(text("%s/containers/neighbour-0/rootfs/kept", param("data")));
}

static int read_neighbours_log(void)
{
    char *state = text("%s/containers/neighbour-0/state", param("data"));
    DIR *folder = opendir(state);
    if (!folder)
        return errno;
    int result = ENOENT;
    for (struct dirent *one; (one = readdir(folder));)
        if (!strncmp(one->d_name, "stdout", 6))
            result = show_file(text("%s/%s", state, one->d_name));
    closedir(folder);
    return result;
}

static int write_neighbours_file(void)
{
    char *path = text("%s/containers/neighbour-0/rootfs/planted", param("data"));
    return write_file(path, O_WRONLY | O_CREAT, "planted");
}

static int write_own_record(void)
{
    return write_file(text("%s/planted", param("state")), O_WRONLY | O_CREAT, "{}");
}

static int move_own_root(void)
{
    return rename(param("rootfs"), text("%s.moved", param("rootfs"))) < 0 ? errno : 0;
}

const struct attempt file_attempts[] = {
    {"read_file", read_file, 0},
    {"read_through_link", read_through_link, 0},
    {"read_upwards", read_upwards, 0},
    {"read_own_root", read_own_root, 1},
    {"read_init_root", read_init_root, 0},
    {"read_launcher_root", read_launcher_root, 0},
    {"read_worker_folder", read_worker_folder, 0},
    {"read_by_handle", read_by_handle, 0},
    {"read_by_hard_link", read_by_hard_link, 0},
    {"read_after_rename", read_after_rename, 0},
    {"read_in_a_race", read_in_a_race, 0},
    {"list_folder", list_folder, 0},
    {"read_others_temporary", read_others_temporary, 0},
    {"write_outside", write_outside, 0},
    {"create_outside", create_outside, 0},
    {"empty_outside", empty_outside, 0},
    {"empty_while_opening", empty_while_opening, 0},
    {"delete_outside", delete_outside, 0},
    {"delete_folder", delete_folder, 0},
    {"make_folder", make_folder, 0},
    {"make_link", make_link, 0},
    {"make_fifo", make_fifo, 0},
    {"rename_outside", rename_outside, 0},
    {"rename_out", rename_out, 0},
    {"hard_link_out", hard_link_out, 0},
    {"write_readable", write_readable, 0},
    {"empty_readable", empty_readable, 0},
    {"delete_readable", delete_readable, 0},
    {"read_key", read_key, 0},
    {"read_journal", read_journal, 0},
    {"read_secret", read_secret, 0},
    {"read_neighbours_file", read_neighbours_file, 0},
    {"read_neighbours_log", read_neighbours_log, 0},
    {"write_neighbours_file", write_neighbours_file, 0},
    {"write_own_record", write_own_record, 0},
    {"move_own_root", move_own_root, 0},
    {0},
};
