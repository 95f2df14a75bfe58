"""What all other packages use: units, plug-ins, files, plots, facts about the machine."""
