/* Written out from the public headers of macOS and xnu: names, types and order.
 *
 * <libproc.h>; bsd/sys/proc_info.h, proc_info_private.h, resource.h, ucred.h; <mach/mach_time.h>. This is what a
 * C compiler makes of them, to hold the layouts of the ctypes code against.
 */
#ifndef DECLARATIONS_H
#define DECLARATIONS_H

#include <stdint.h>
#include <sys/types.h>

#define MAXCOMLEN 16
#define NGROUPS_OF_XUCRED 16

struct proc_bsdinfo {
    uint32_t pbi_flags;
    uint32_t pbi_status;
    uint32_t pbi_xstatus;
    uint32_t pbi_pid;
    uint32_t pbi_ppid;
    uid_t pbi_uid;
    gid_t pbi_gid;
    uid_t pbi_ruid;
    gid_t pbi_rgid;
    uid_t pbi_svuid;
    gid_t pbi_svgid;
    uint32_t rfu_1;
    char pbi_comm[MAXCOMLEN];
    char pbi_name[2 * MAXCOMLEN];
    uint32_t pbi_nfiles;
    uint32_t pbi_pgid;
    uint32_t pbi_pjobc;
    uint32_t e_tdev;
    uint32_t e_tpgid;
    int32_t pbi_nice;
    uint64_t pbi_start_tvsec;
    uint64_t pbi_start_tvusec;
};

struct proc_uniqidentifierinfo {
    uint8_t p_uuid[16];
    uint64_t p_uniqueid;
    uint64_t p_puniqueid;
    int32_t p_idversion;
    int32_t p_orig_ppidversion;
    uint64_t p_reserve2;
    uint64_t p_reserve3;
};

struct proc_bsdinfowithuniqid {
    struct proc_bsdinfo pbsd;
    struct proc_uniqidentifierinfo p_uniqidentifier;
};

struct proc_taskinfo {
    uint64_t pti_virtual_size, pti_resident_size, pti_total_user, pti_total_system, pti_threads_user;
    uint64_t pti_threads_system;
    int32_t pti_policy, pti_faults, pti_pageins, pti_cow_faults, pti_messages_sent, pti_messages_received;
    int32_t pti_syscalls_mach, pti_syscalls_unix, pti_csw, pti_threadnum, pti_numrunning, pti_priority;
};

struct proc_exitreasonbasicinfo {
    uint32_t beri_namespace;
    uint64_t beri_code;
    uint64_t beri_flags;
    uint32_t beri_reason_buf_size;
} __attribute__((packed));

struct proc_fdinfo {
    int32_t proc_fd;
    uint32_t proc_fdtype;
};

struct rusage_info_v4 {
    uint8_t ri_uuid[16];
    uint64_t ri_user_time, ri_system_time, ri_pkg_idle_wkups, ri_interrupt_wkups, ri_pageins, ri_wired_size;
    uint64_t ri_resident_size, ri_phys_footprint, ri_proc_start_abstime, ri_proc_exit_abstime;
    uint64_t ri_child_user_time, ri_child_system_time, ri_child_pkg_idle_wkups, ri_child_interrupt_wkups;
    uint64_t ri_child_pageins, ri_child_elapsed_abstime, ri_diskio_bytesread, ri_diskio_byteswritten;
    uint64_t ri_cpu_time_qos_default, ri_cpu_time_qos_maintenance, ri_cpu_time_qos_background;
    uint64_t ri_cpu_time_qos_utility, ri_cpu_time_qos_legacy, ri_cpu_time_qos_user_initiated;
    uint64_t ri_cpu_time_qos_user_interactive, ri_billed_system_time, ri_serviced_system_time;
    uint64_t ri_logical_writes, ri_lifetime_max_phys_footprint, ri_instructions, ri_cycles, ri_billed_energy;
    uint64_t ri_serviced_energy, ri_interval_max_phys_footprint, ri_runnable_time;
};

struct mach_timebase_info {
    uint32_t numer, denom;
};

struct xucred {
    unsigned int cr_version;
    uid_t cr_uid;
    short cr_ngroups;
    gid_t cr_groups[NGROUPS_OF_XUCRED];
};

#endif
