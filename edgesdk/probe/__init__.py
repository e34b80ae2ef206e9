"""Read what a device is through its link, and write a profile that is bound to that very board."""
