-- What is active, what nobody has acknowledged and what is off the list is found without a walk through the history.
CREATE INDEX alarm_firm_id_active_index ON alarm (firm_id, started DESC, id DESC) WHERE ended IS NULL;
CREATE INDEX alarm_firm_id_unacknowledged_index ON alarm (firm_id, started DESC, id DESC) WHERE NOT acknowledged;
CREATE INDEX alarm_firm_id_suppressed_index ON alarm (firm_id, started DESC, id DESC) WHERE suppression <> 0;

-- Of a firm in an hour.
CREATE INDEX tuning_firm_id_made_index ON tuning (firm_id, made);
-- Whether a tuning still holds anywhere.
CREATE INDEX tuning_start_tuning_id_index ON tuning_start (tuning_id);
