/* The label of a security module that the program is to have: AppArmor's profile, SELinux's context. The kernel takes it here and gives it
 * with exec, or lets exec fail; the launcher looks once more. Written by way of the host's /proc: as root the cell's own is read-only.
 * proc_pid_attr(5), apparmor(7), selinux(8) */
#include "kernel.h"
#include "ladder.h"

int label_ask(const struct cell *cell) {
	const struct plan *plan = cell->plan;
	return plan->label ? put(cell->proc, at(plan, plan->label_file), at(plan, plan->label)) : 0;
}
