"""binfmt_misc: the kernel hands programs of other architectures to qemu-user.

`magic`: what such programs look like.  `emulator`: where QEMU is.  `status`: what the kernel was told, and which systems can be
built so.  `register`: telling it, by way of `kernel` and `record`.  Source: Documentation/admin-guide/binfmt-misc.rst of Linux.
"""
