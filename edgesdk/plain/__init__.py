"""Devices without Python: an Android shell, a busybox board. Installs are shell scripts, programs are run by the runtimes' own tools.

tools     which tool a runner is, its flags, the command lines for it
output    what the tools print, read
explain   why a tool did not run, in two lines
device    check, health, facts and profile on such a device
"""
