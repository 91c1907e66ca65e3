"""Where Fast DDS looks for its profile, by ROS distribution. The standard library only: launch files and nodes read it."""

#: Later distributions read the first one, and warn in every process where they find the second one.
PROFILE_VARIABLES = ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE")
#: These read the second one alone.
OLD_PROFILE_DISTROS = ("humble", "iron", "jazzy")
