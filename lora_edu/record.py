"""python -m lora_edu.record NAME makes one of the course's records again; `course/records/command.py` lists them."""
from lora_edu.course.records.command import main

if __name__ == "__main__":
    main()
