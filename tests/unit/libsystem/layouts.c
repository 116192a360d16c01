/* Sizes and offsets as a C compiler computes them from the declarations. */
#include "declarations.h"

#include <stddef.h>
#include <string.h>

#define SIZE(type) \
    if (strcmp(name, #type) == 0) return (int)sizeof(struct type)
#define OFFSET(type, member) \
    if (strcmp(name, #type "." #member) == 0) return (int)offsetof(struct type, member)

/* Of `struct` or `struct.member`; -1 for what is not listed. Members of what ctypes has as a structure are not:
 * the test compiles a program that tells them all. */
int fake_layout(const char *name) {
    SIZE(proc_bsdinfo);
    SIZE(proc_uniqidentifierinfo);
    SIZE(proc_bsdinfowithuniqid);
    SIZE(proc_taskinfo);
    SIZE(proc_exitreasonbasicinfo);
    SIZE(proc_fdinfo);
    SIZE(rusage_info_v4);
    SIZE(mach_timebase_info);
    SIZE(xucred);
    OFFSET(xucred, cr_uid);
    OFFSET(xucred, cr_groups);
    return -1;
}
