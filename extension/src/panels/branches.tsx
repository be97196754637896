// The branch tree of the session: a click goes back to a node.
import * as React from 'react';
import { tree } from '../model';
import type { NodeBrief } from '../protocol';
import type { PartProps } from './parts';
import { can } from './parts';

export function Branches(props: PartProps): React.ReactElement {
  const { trans, view, perform } = props;
  const rows = tree(view.snapshot?.branches ?? []);
  if (rows.length === 0) {
    return (
      <p className="jp-Djinn-empty">
        {trans.__('No stops yet. Each one appears here, to go back to.')}
      </p>
    );
  }
  return (
    <ul className="jp-Djinn-list">
      {rows.map(({ node, depth }) => (
        <li key={node.number}>
          <button
            type="button"
            className={`jp-Djinn-node ${node.current ? 'jp-mod-current' : ''}`}
            style={{ paddingInlineStart: `${6 + 12 * Math.min(depth, 8)}px` }}
            aria-current={node.current ? 'true' : undefined}
            disabled={!can(view, 'go_to')}
            title={
              node.kept
                ? trans.__('Go back to node %1', node.number)
                : trans.__(
                    'Go back to node %1; it is computed again, exactly',
                    node.number
                  )
            }
            onClick={() => {
              if (!node.current) {
                void perform('go_to', { node: node.number });
              }
            }}
          >
            <span className="jp-Djinn-number">{node.number}</span>
            <span className="jp-Djinn-grow">{nodeText(node, props)}</span>
            <span className="jp-Djinn-note">
              {[
                ...(node.num_edits > 0
                  ? [trans._n('%1 edit', '%1 edits', node.num_edits)]
                  : []),
                ...(node.current ? [trans.__('here')] : [])
              ].join(' · ')}
            </span>
          </button>
        </li>
      ))}
    </ul>
  );
}

function nodeText(node: NodeBrief, props: PartProps): string {
  const { trans } = props;
  if (node.status === 'finished') {
    return trans.__('finished, %1 tokens', node.num_tokens);
  }
  const place = node.location ?? trans.__('start');
  return trans.__('%1, forward %2', place, node.forward);
}
