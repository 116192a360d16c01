/* Sizes and offsets as a C compiler computes them from the declarations. */
#include "declarations.h"

#include <stddef.h>
#include <string.h>

#define SIZE(type) \
    if (strcmp(name, #type) == 0) return (int)sizeof(struct type)
#define OFFSET(type, member) \
    if (strcmp(name, #type "." #member) == 0) return (int)offsetof(struct type, member)

/* Of `struct` or `struct.member`; -1 for what is not listed. */
int fake_layout(const char *name) {
    SIZE(proc_bsdinfo);
    OFFSET(proc_bsdinfo, pbi_status);
    OFFSET(proc_bsdinfo, pbi_pid);
    OFFSET(proc_bsdinfo, pbi_ppid);
    OFFSET(proc_bsdinfo, pbi_uid);
    OFFSET(proc_bsdinfo, pbi_comm);
    OFFSET(proc_bsdinfo, pbi_name);
    OFFSET(proc_bsdinfo, pbi_nfiles);
    OFFSET(proc_bsdinfo, pbi_nice);
    OFFSET(proc_bsdinfo, pbi_start_tvsec);
    OFFSET(proc_bsdinfo, pbi_start_tvusec);
    SIZE(proc_uniqidentifierinfo);
    OFFSET(proc_uniqidentifierinfo, p_uniqueid);
    OFFSET(proc_uniqidentifierinfo, p_puniqueid);
    OFFSET(proc_uniqidentifierinfo, p_idversion);
    OFFSET(proc_uniqidentifierinfo, p_reserve3);
    SIZE(proc_bsdinfowithuniqid);
    OFFSET(proc_bsdinfowithuniqid, p_uniqidentifier);
    SIZE(proc_taskinfo);
    OFFSET(proc_taskinfo, pti_total_user);
    OFFSET(proc_taskinfo, pti_policy);
    OFFSET(proc_taskinfo, pti_threadnum);
    SIZE(proc_exitreasonbasicinfo);
    OFFSET(proc_exitreasonbasicinfo, beri_code);
    OFFSET(proc_exitreasonbasicinfo, beri_reason_buf_size);
    SIZE(proc_fdinfo);
    SIZE(rusage_info_v4);
    OFFSET(rusage_info_v4, ri_user_time);
    OFFSET(rusage_info_v4, ri_phys_footprint);
    OFFSET(rusage_info_v4, ri_diskio_bytesread);
    OFFSET(rusage_info_v4, ri_diskio_byteswritten);
    OFFSET(rusage_info_v4, ri_runnable_time);
    SIZE(mach_timebase_info);
    SIZE(xucred);
    OFFSET(xucred, cr_uid);
    OFFSET(xucred, cr_groups);
    return -1;
}
