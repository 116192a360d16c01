/* Executing: programs of others, and to become more than one is. */
#include "attack.h"

#include <linux/capability.h>
#include <grp.h>
#include <sys/mman.h>

static char *ran[] = {"attack", "ran", NULL};

static int run_outside(void) { return run_program(outside("program"), ran); }

static int run_readable(void) { return run_program(text("%s/program", param("readable")), ran); }

static int run_by_loader(void)
{
    char *argv[] = {"loader", outside("program"), "ran", NULL};
    if (!*param("loader")) {
        say("no loader");
        return UNAVAILABLE;
    }
    return run_program(param("loader"), argv);
}

static int run_as_interpreter(void)
{
    char *script = own("script");
    int result = write_file(script, O_WRONLY | O_CREAT, text("#!%s ran\n", outside("program")));
    if (result)
        return result;
    if (chmod(script, 0755) < 0)
        return errno;
    char *argv[] = {script, NULL};
    return run_program(script, argv);
}

/* A program that no file system knows: is it free of the sandbox? */
static int run_from_memory(void)
{
    char bytes[65536];
    int made = memfd_create("attack", 0), source = open(param("program"), O_RDONLY | O_CLOEXEC);
    if (made < 0 || source < 0)
        return errno;
    for (ssize_t length; (length = read(source, bytes, sizeof bytes)) > 0;)
        if (write(made, bytes, length) != length)
            return errno;
    int ends[2];
    if (pipe(ends) < 0)
        return errno;
    pid_t child = fork();
    if (child < 0)
        return errno;
    if (child == 0) {
        char *argv[] = {"attack", "probe", outside("read_file"), NULL}, *env[] = {NULL};
        dup2(ends[1], 1);
        syscall(SYS_execveat, made, "", argv, env, AT_EMPTY_PATH);
        _exit(errno);
    }
    close(ends[1]);
    int result = show_descriptor(ends[0]), status;
    waitpid(child, &status, 0);
    return result ? result : WIFEXITED(status) ? WEXITSTATUS(status) : ECHILD;
}

static int run_set_user_id(void)
{
    char *argv[] = {"attack", "id", NULL};
    if (geteuid() == 0 || !*param("set_user_id")) {
        say("it is root already, or nobody here could make such a program");
        return UNAVAILABLE;
    }
    return run_program(param("set_user_id"), argv);
}

static int gain_by_exec(void)
{
    char *argv[] = {"attack", "caps", NULL};
    return run_program(param("program"), argv);
}

static int take_capabilities(void)
{
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{1u << CAP_SYS_ADMIN, 1u << CAP_SYS_ADMIN, 0}, {0}};
    return syscall(SYS_capset, &header, data) < 0 ? errno : 0;
}

static int take_groups(void)
{
    gid_t group = 4343;
    return setgroups(1, &group) < 0 ? errno : 0;
}

static int become_another_user(void)
{
    uid_t other = getuid() ? 0 : 4343;
    return setresuid(other, other, other) < 0 ? errno : 0;
}

/* By each of the calls that can: the file would serve whoever may reach it on the host. */
static int make_set_user_id(void)
{
    char *paths[] = {own("suid-chmod"), own("suid-open"), own("suid-node"), own("suid-late")};
    struct stat status;
    umask(0);
    close(open(paths[0], O_CREAT | O_WRONLY, 0755));
    if (chmod(paths[0], 04755) < 0)
        say("chmod %d ", errno);
    if (open(paths[1], O_CREAT | O_WRONLY, 04755) < 0)
        say("open %d ", errno);
    if (mknod(paths[2], S_IFREG | 04755, 0) < 0)
        say("mknod %d ", errno);
    int late = open(paths[3], O_CREAT | O_WRONLY, 0755);
    if (late < 0 || fchmod(late, 06755) < 0)
        say("fchmod %d ", errno);
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
        if (stat(paths[i], &status) == 0 && status.st_mode & 06000)
            return 0;
    return EPERM;
}

const struct attempt program_attempts[] = {
    {"run_outside", run_outside, 0},
    {"run_readable", run_readable, 0},
    {"run_by_loader", run_by_loader, 0},
    {"run_as_interpreter", run_as_interpreter, 0},
    {"run_from_memory", run_from_memory, 0},
    {"run_set_user_id", run_set_user_id, 0},
    {"gain_by_exec", gain_by_exec, 0},
    {"take_capabilities", take_capabilities, 0},
    {"take_groups", take_groups, 0},
    {"become_another_user", become_another_user, 0},
    {"make_set_user_id", make_set_user_id, 0},
    {0},
};
