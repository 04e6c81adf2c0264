/* Questions to the kernel that Python cannot ask by itself. Plain declarations, read by cffi as they stand. */
int probe_landlock_abi(void); /* 0: no Landlock */
int probe_userns(void);       /* 0, or the errno with which a user namespace is refused */
