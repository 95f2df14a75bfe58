"""What is done with a model beside running it: doctor, plan, pack, verify, self-test."""
