#include <stdio.h>

int main(void)
{
#ifdef __GNU__
    puts("hello, GNU/Hurd");
#else
    puts("hello, world");
#endif
    return 0;
}
