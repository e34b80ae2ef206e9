// Numbers and groups of words, the same on a GPU and on a CPU.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i8 = signed char;
struct alignas(8) Words2 { u32 v[2]; };
struct alignas(16) Words4 { u32 v[4]; };
