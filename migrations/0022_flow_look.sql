-- A look at flows takes as many notes as it is told: the rows are chosen once, and not anew for each that is deleted.

-- Look at nodes that transactions have left to look at. Returns how many there were.
create or replace function streamworker.flow_look(most integer) returns integer language plpgsql volatile
set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  nodes bigint[];
  it bigint;
begin
  with chosen as materialized (
    select id from streamworker.flow_checks order by id limit flow_look.most for update skip locked
  ), taken as (
    delete from streamworker.flow_checks as note using chosen where note.id = chosen.id returning note.node
  )
  select array_agg(distinct node order by node) into nodes from taken;
  if nodes is null then
    return 0;
  end if;
  foreach it in array nodes loop
    if streamworker.flow_decide(it, false) is not null then
      perform streamworker.flow_go_on(array[it]);
    end if;
  end loop;
  return cardinality(nodes);
end
$$;
