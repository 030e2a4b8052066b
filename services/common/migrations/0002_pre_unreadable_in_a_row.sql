-- How many records directly before the position could not be read: the limit on them holds over restarts too.
-- Below 0: a person has looked and allows so many more.
ALTER TABLE position ADD COLUMN unreadable_in_a_row int NOT NULL DEFAULT 0;
