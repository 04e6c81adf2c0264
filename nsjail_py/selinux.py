"""A module of SELinux policy to begin with: a domain for what runs inside.

    nsjail-py selinux sample >nsjail_payload.cil
    sudo semodule -i nsjail_payload.cil

semodule(8), https://github.com/SELinuxProject/selinux/tree/main/secilc/docs
"""

from __future__ import annotations

SAMPLE = """\
; A sample for what runs inside. It says once more what namespaces and mounts say already. In a policy:
;   selinux = "system_u:system_r:nsjail_payload_t:s0"              from a service
;   selinux = "unconfined_u:unconfined_r:nsjail_payload_t:s0"      from a login (id -Z tells user and role)
(type nsjail_payload_t)
(typeattributeset domain (nsjail_payload_t))
(roletype system_r nsjail_payload_t)
(roletype unconfined_r nsjail_payload_t)

; Who may start it: the caller's domain, here any unconfined one. Under no_new_privs and nosuid mounts exec needs process2, too. Without
; siginh and rlimitinh exec would undo what the jail has set; without noatsecure the loader would ignore the policy's environment.
(allow unconfined_domain_type nsjail_payload_t (process (transition siginh rlimitinh noatsecure)))
(allow unconfined_domain_type nsjail_payload_t (process2 (nnp_transition nosuid_transition)))

; What is its own: /work, /tmp and /dev/shm are one tmpfs, whose directories have the type that the caller's domain gives them there. A
; directory of the host that a policy shows writable needs its type here.
(typeattribute nsjail_own)
(typeattributeset nsjail_own (tmpfs_t user_tmpfs_t))
(optional nsjail_init (typeattributeset nsjail_own (initrc_runtime_t)))
(allow nsjail_payload_t nsjail_own (dir (getattr setattr open read search ioctl lock)))
(allow nsjail_payload_t nsjail_own (dir (create write add_name remove_name rename reparent rmdir)))
(allow nsjail_payload_t nsjail_own (file (getattr setattr open read map ioctl lock create write append rename link unlink)))
(allow nsjail_payload_t nsjail_own (lnk_file (getattr setattr read create rename link unlink)))
(allow nsjail_payload_t nsjail_own (fifo_file (getattr setattr open read ioctl lock create write append rename link unlink)))
(allow nsjail_payload_t nsjail_own (sock_file (getattr setattr open read create write append rename link unlink)))

; Programs and libraries, wherever the jail shows them; never what was written inside, and no passwords or keys of the host's.
(typeattribute nsjail_shown)
(typeattributeset nsjail_shown (and (non_security_file_type) (not (nsjail_own))))
(allow nsjail_payload_t nsjail_shown (dir (getattr open read search ioctl lock)))
(allow nsjail_payload_t nsjail_shown (lnk_file (getattr read)))
(allow nsjail_payload_t nsjail_shown (file (getattr open read map ioctl lock execute execute_no_trans entrypoint)))
(allow nsjail_payload_t filesystem_type (filesystem (getattr)))

; Its processes, and what lies between them. No execmem: a compiler at run time (node, PyPy) needs it.
(allow nsjail_payload_t self (process (fork getattr getsched setsched getcap getpgid setpgid getsession getrlimit setrlimit)))
(allow nsjail_payload_t self (process (sigchld sigkill signal signull sigstop)))
(allow nsjail_payload_t self (fd (use)))
(allow nsjail_payload_t self (fifo_file (getattr open read write append ioctl lock)))
(allow nsjail_payload_t self (unix_stream_socket (create bind listen accept connect connectto)))
(allow nsjail_payload_t self (unix_stream_socket (read write getattr getopt setopt shutdown ioctl)))
(allow nsjail_payload_t self (unix_dgram_socket (create bind connect sendto read write getattr getopt setopt shutdown ioctl)))

; /proc, as far as the jail shows it, and devices.
(allow nsjail_payload_t self (dir (getattr open read search)))
(allow nsjail_payload_t self (file (getattr open read write append)))
(allow nsjail_payload_t self (lnk_file (getattr read)))
(allow nsjail_payload_t proc_t (dir (getattr open read search)))
(allow nsjail_payload_t proc_t (file (getattr open read)))
(allow nsjail_payload_t random_device_t (chr_file (getattr open read ioctl)))
(allow nsjail_payload_t urandom_device_t (chr_file (getattr open read ioctl)))
(allow nsjail_payload_t devpts_t (dir (getattr open read search)))
(allow nsjail_payload_t devpts_t (chr_file (getattr setattr open read write append ioctl)))

; What the caller passes on: pipes, sockets, his terminal. And the word of a process that ends.
(allow nsjail_payload_t unconfined_domain_type (fd (use)))
(allow nsjail_payload_t unconfined_domain_type (fifo_file (getattr read write append ioctl lock)))
(allow nsjail_payload_t unconfined_domain_type (unix_stream_socket (getattr getopt setopt read write shutdown ioctl)))
(allow nsjail_payload_t unconfined_domain_type (process (sigchld)))
(allow nsjail_payload_t ptynode (chr_file (getattr read write append ioctl)))

; No capability, mount, ptrace or network: what is not named is refused.
"""
