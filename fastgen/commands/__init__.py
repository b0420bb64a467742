"""The commands of the command line. None of these modules imports anything heavy before a command runs."""
