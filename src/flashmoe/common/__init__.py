"""What every floor stands on: units, plug-ins, files, plots, facts about the machine."""
